"""The documentation: its pages, and the program that builds the site from them."""
