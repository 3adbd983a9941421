"""The cache of frozen streams' values: each is computed once for each (identity of the stream, response)."""
