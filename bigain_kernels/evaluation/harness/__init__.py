"""Evaluations of any size: one table of denoising errors, and everything else a query over it."""
