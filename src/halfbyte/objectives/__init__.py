"""What a training learns of its rows: one file for each method, behind one seam."""
