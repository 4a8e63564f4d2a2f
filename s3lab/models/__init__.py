"""Language models: what they read, how they are built, and how they are pruned, corrected, measured and stored.

`text` has the words and the models to begin with; `structure` finds the linear layers and what couples them; `prune`
walks a model layer by layer; `search` decides which layer gets what; `correct` changes weights around a mask; `inputs`
prunes what a layer reads; `measure` says what a model can still do; `storage` writes and reads folders; `recover`
trains what is kept.  A group imports only from those named before it.
"""
