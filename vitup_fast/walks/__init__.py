"""How a set of queries passes through the network, one file for each way."""
