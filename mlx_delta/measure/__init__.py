"""What measuring shares: settings, sparsity, traffic, texts, tables and the machine's entry."""
