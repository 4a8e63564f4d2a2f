"""The tables behind notebooks: solvers timed and compared, texts crossed, corrections and pruned inputs, intervals."""
