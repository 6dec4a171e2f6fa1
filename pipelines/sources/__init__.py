"""Where a store's images come from: phantom, ``.npz`` files (MedMNIST's too), folders, arrays, data sets."""
