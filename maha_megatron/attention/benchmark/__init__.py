"""Measuring the operator: what is measured, on which inputs, how time and memory are taken, and the gate before it."""
