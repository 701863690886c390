"""How objects look in a cell and on a page; knows data only."""
