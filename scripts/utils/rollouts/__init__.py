"""Other engines that write the responses of PPO."""
