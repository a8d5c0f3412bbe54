"""What a person should look at: labels that are likely wrong, and images whose labels would tell most."""
