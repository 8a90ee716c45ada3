"""The commands that only read: `audit verify`, `audit show`, `policy check`. No serving process loads them."""
