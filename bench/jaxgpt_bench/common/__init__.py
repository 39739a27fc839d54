"""What every measurement uses: provenance, processes, tables, plots."""
