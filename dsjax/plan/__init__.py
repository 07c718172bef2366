"""Figures known before a device is touched: parameters, bytes. Knows nothing about running."""
