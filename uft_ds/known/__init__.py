"""Values of frozen streams, computed once for each (identity of the stream, response)."""
