"""Models side by side: one table like the paper's, differences in pairs with intervals, and what alignment has cost."""
