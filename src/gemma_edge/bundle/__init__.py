"""What a bundle is: its manifest, its caches' geometry, its backends. Imports no torch and no other package of ours."""
