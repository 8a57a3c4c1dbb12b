"""The theory lab: linear attention on linear regression, closed forms beside simulation."""
