"""The reference job behind `esper ppo`: a real PPO run, faults on purpose, and its terminal."""
