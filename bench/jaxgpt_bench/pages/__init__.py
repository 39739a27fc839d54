"""Every figure of the README and of docs/, from the committed files of bench/results/."""
