"""Programs for development: the matrix of versions, sanitizers, injected faults, and generators of tables and pictures
in docs/. None of them is a test or a benchmark."""
