"""Methods compared at an equal budget: paired tests on the same rows, what each method gained, tables and a plot."""
