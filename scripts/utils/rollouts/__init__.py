"""The responses of a PPO update: how they are sampled, what they are worth, what is said of them."""
