/* TEST ONLY: the native code of the double in LiteRt.kt, over LiteRT's C API in Android's own library.
 * BIONIC_LITERT=FOLDER/NAME.so names the library. A call that fails throws a LiteRtException. */
#include <jni.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "loader.h"

typedef void *P;
static P library;

static P at(const char *name) {
    if (!library) {
        char folder[4096];
        snprintf(folder, sizeof folder, "%s", getenv("BIONIC_LITERT"));
        char *slash = strrchr(folder, '/');
        *slash = 0;
        if (!(library = bionic_load(folder, slash + 1))) { fprintf(stderr, "no %s\n", getenv("BIONIC_LITERT")); abort(); }
    }
    P found = bionic_symbol(library, name);
    if (!found) { fprintf(stderr, "no %s\n", name); abort(); }
    return found;
}

static int fails(JNIEnv *e, const char *name, int status) {
    if (!status) return 0;
    char text[256];
    snprintf(text, sizeof text, "%s: status %d", name, status);
    (*e)->ThrowNew(e, (*e)->FindClass(e, "com/google/ai/edge/litert/LiteRtException"), text);
    return 1;
}
#define CALL(result, name, ...) do { if (fails(e, #name, ((int (*)())at(#name))(__VA_ARGS__))) return result; } while (0)
#define TEXT(s) (*e)->GetStringUTFChars(e, s, NULL)
#define F(type, name) JNIEXPORT type JNICALL Java_com_google_ai_edge_litert_Native_##name

static int find_signature(JNIEnv *e, P model, const char *name, P *signature, size_t *index) {
    size_t n;
    CALL(0, LiteRtGetNumModelSignatures, model, &n);
    for (*index = 0; *index < n; ++*index) {
        const char *key;
        CALL(0, LiteRtGetModelSignature, model, *index, signature);
        CALL(0, LiteRtGetSignatureKey, *signature, &key);
        if (!strcmp(key, name)) return 1;
    }
    fails(e, "no such signature", 6);
    return 0;
}
static size_t count(P signature, int input) {
    size_t n = 0;
    ((int (*)())at(input ? "LiteRtGetNumSignatureInputs" : "LiteRtGetNumSignatureOutputs"))(signature, &n);
    return n;
}
static const char *name_at(P signature, int input, size_t i) {
    const char *name = "";
    ((int (*)())at(input ? "LiteRtGetSignatureInputName" : "LiteRtGetSignatureOutputName"))(signature, i, &name);
    return name;
}
static int find_tensor(JNIEnv *e, P signature, const char *name, int input, P *tensor, size_t *i) {
    size_t n = count(signature, input);
    for (*i = 0; *i < n && strcmp(name_at(signature, input, *i), name); ++*i) {}
    if (*i == n) { fails(e, "no such tensor", 6); return 0; }
    int status = ((int (*)())at(input ? "LiteRtGetSignatureInputTensorByIndex" : "LiteRtGetSignatureOutputTensorByIndex"))(signature, *i, tensor);
    return !fails(e, "tensor", status);
}

F(jlong, environment)(JNIEnv *e, jclass c) {
    P made;
    CALL(0, LiteRtCreateEnvironment, 0, NULL, &made);
    return (jlong)made;
}
F(jlong, load)(JNIEnv *e, jclass c, jstring path) {
    static P environment; /* the C API wants one, Kotlin's has none here */
    P made;
    if (!environment) CALL(0, LiteRtCreateEnvironment, 0, NULL, &environment);
    CALL(0, LiteRtCreateModelFromFile, environment, TEXT(path), &made);
    return (jlong)made;
}
F(jlong, compile)(JNIEnv *e, jclass c, jlong environment, jlong model, jint accelerators, jint threads, jstring cache) {
    P options, cpu, opaque, payload, made;
    const char *id;
    void (*deleter)(P);
    CALL(0, LiteRtCreateOptions, &options);
    CALL(0, LiteRtSetOptionsHardwareAccelerators, options, accelerators);
    CALL(0, LrtCreateCpuOptions, &cpu);
    CALL(0, LrtSetCpuOptionsNumThread, cpu, threads);
    if (cache) CALL(0, LrtSetCpuOptionsXnnPackWeightCachePath, cpu, TEXT(cache));
    CALL(0, LrtGetOpaqueCpuOptionsData, cpu, &id, &payload, &deleter);
    CALL(0, LiteRtCreateOpaqueOptions, id, payload, deleter, &opaque);
    CALL(0, LiteRtAddOpaqueOptions, options, opaque);
    CALL(0, LiteRtCreateCompiledModel, (P)environment, (P)model, options, &made);
    return (jlong)made;
}
F(jobjectArray, names)(JNIEnv *e, jclass c, jlong model, jstring name, jboolean input) {
    P signature;
    size_t index;
    if (!find_signature(e, (P)model, TEXT(name), &signature, &index)) return NULL;
    size_t n = count(signature, input);
    jobjectArray all = (*e)->NewObjectArray(e, n, (*e)->FindClass(e, "java/lang/String"), NULL);
    for (size_t i = 0; i < n; i++) (*e)->SetObjectArrayElement(e, all, i, (*e)->NewStringUTF(e, name_at(signature, input, i)));
    return all;
}
F(jintArray, shape)(JNIEnv *e, jclass c, jlong model, jstring name, jstring tensor_name, jboolean input) {
    P signature, tensor;
    size_t index, i;
    jint type[64]; /* LiteRtRankedTensorType: the element type, 7 bits of rank, the sizes */
    if (!find_signature(e, (P)model, TEXT(name), &signature, &index)) return NULL;
    if (!find_tensor(e, signature, TEXT(tensor_name), input, &tensor, &i)) return NULL;
    CALL(NULL, LiteRtGetRankedTensorType, tensor, type);
    jint rank = type[1] & 127;
    type[1] = type[0];
    jintArray all = (*e)->NewIntArray(e, 1 + rank);
    (*e)->SetIntArrayRegion(e, all, 0, 1 + rank, type + 1);
    return all;
}
F(jlong, buffer)(JNIEnv *e, jclass c, jlong environment, jlong model, jlong compiled, jstring name, jstring tensor_name, jboolean input) {
    P signature, tensor, need, made;
    size_t index, i;
    char type[256];
    if (!find_signature(e, (P)model, TEXT(name), &signature, &index)) return 0;
    if (!find_tensor(e, signature, TEXT(tensor_name), input, &tensor, &i)) return 0;
    if (input) CALL(0, LiteRtGetCompiledModelInputBufferRequirements, (P)compiled, index, i, &need);
    else CALL(0, LiteRtGetCompiledModelOutputBufferRequirements, (P)compiled, index, i, &need);
    CALL(0, LiteRtGetRankedTensorType, tensor, type);
    CALL(0, LiteRtCreateManagedTensorBufferFromRequirements, (P)environment, type, need, &made);
    return (jlong)made;
}
F(void, run)(JNIEnv *e, jclass c, jlong model, jlong compiled, jstring name, jlongArray in, jlongArray out) {
    P signature;
    size_t index;
    jlong ins[256], outs[256];
    jsize n = (*e)->GetArrayLength(e, in), k = (*e)->GetArrayLength(e, out);
    if (!find_signature(e, (P)model, TEXT(name), &signature, &index)) return;
    (*e)->GetLongArrayRegion(e, in, 0, n, ins);
    (*e)->GetLongArrayRegion(e, out, 0, k, outs);
    CALL(, LiteRtRunCompiledModel, (P)compiled, index, (size_t)n, ins, (size_t)k, outs);
}
F(void, copy)(JNIEnv *e, jclass c, jlong buffer, jobject array, jlong bytes, jboolean write) {
    P memory;
    size_t size;
    CALL(, LiteRtGetTensorBufferPackedSize, (P)buffer, &size);
    if (bytes != (jlong)size) { fails(e, "wrong size", 1); return; }
    CALL(, LiteRtLockTensorBuffer, (P)buffer, &memory, write ? 1 : 0);
    void *data = (*e)->GetPrimitiveArrayCritical(e, array, NULL);
    if (write) memcpy(memory, data, bytes); else memcpy(data, memory, bytes);
    (*e)->ReleasePrimitiveArrayCritical(e, array, data, write ? JNI_ABORT : 0);
    CALL(, LiteRtUnlockTensorBuffer, (P)buffer);
}
F(jlong, size)(JNIEnv *e, jclass c, jlong buffer) {
    size_t n;
    CALL(0, LiteRtGetTensorBufferPackedSize, (P)buffer, &n);
    return n;
}
F(void, destroy)(JNIEnv *e, jclass c, jstring kind, jlong handle) {
    char name[64];
    snprintf(name, sizeof name, "LiteRtDestroy%s", TEXT(kind));
    ((void (*)(P))at(name))((P)handle);
}
