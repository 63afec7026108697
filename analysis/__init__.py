"""The paper's analysis as scripts a person runs (Fig. 1 to 3) and as drawing functions; see ``python FILE --help``."""
