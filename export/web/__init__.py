"""The web backend: a bundle that is also a static site, whose page runs the model in the browser by LiteRT.js."""
