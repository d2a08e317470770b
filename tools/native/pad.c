/* TEST ONLY, preloaded on arm64. Bionic keeps its stack guard at a fixed offset from the thread pointer, where glibc on arm64 has the
 * first thread-local variables: this library takes that place, so that nobody changes it. */
__thread char bionic_slots[512] __attribute__((aligned(16), tls_model("initial-exec"))) = {0};
char *bionic_slots_at(void) { return bionic_slots; }
