"""Why a distillation did not help: what a finished run and its data show, each figure with a verdict and a remedy.

`findings` says what a finding is, `examining.examine` makes them. Between the two: `predictions`, `texts`, `courses`,
`recorded` and `gradients`, each with the figures that it takes, the thresholds, and their reasons.
"""
