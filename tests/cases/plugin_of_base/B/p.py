print("B plugin runs instead")
