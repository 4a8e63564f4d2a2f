"""What a pruned model can still do: perplexity, the tasks of lm_eval, and single layers to try solvers on."""
