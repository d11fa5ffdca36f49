"""Runs batches: reads their lines, hands them to the ledger as jobs, and writes what became of them."""
