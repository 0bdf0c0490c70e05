"""Training on one GPU: forward and backward of packed rows written by hand, in memory laid out beforehand."""
