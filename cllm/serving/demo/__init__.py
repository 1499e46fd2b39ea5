"""AR and Jacobi decoding of one prompt side by side, as a web page and as an animated picture."""
