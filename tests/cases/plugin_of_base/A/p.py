print("A plugin")
