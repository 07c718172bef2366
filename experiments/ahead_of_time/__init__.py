"""The package: compiling for devices that are not there."""
