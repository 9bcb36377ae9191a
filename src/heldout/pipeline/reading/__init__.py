"""One line of a user's file after another: what it says, or everything that is wrong with it."""
