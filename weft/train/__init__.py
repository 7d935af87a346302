"""Objective, optimizer, loop, metrics and report."""
