"""What is done with an adaptive network: depths profiled, scored, and exported."""
