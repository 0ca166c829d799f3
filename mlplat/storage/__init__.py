"""Storage: what is kept for how long, who may not delete what, how much there is and may be."""
