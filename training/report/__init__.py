"""HTML pages about runs: what each was, how it went and what its network gets wrong."""
