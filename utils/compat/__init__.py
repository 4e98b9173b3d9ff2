"""Scripts written for YOLOv5 meet this program's own functions here, by the names and signatures that they know."""
