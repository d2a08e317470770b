"""`gemma-bench`: speed, latency and memory of bundles, of peers, and on phones over adb."""
