"""From a trial to its record: the network, the loop, the grid of all trials, many machines."""
