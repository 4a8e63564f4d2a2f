"""Changes of basis before pruning, which leave what a model computes as it was.

Channels in another order (`permute`), the residual stream and the values of heads rotated (`rotate`); `prepare` does
both before a run.  What may change, and where it must be undone, is found by trying it on one layer (`bench`).
"""
