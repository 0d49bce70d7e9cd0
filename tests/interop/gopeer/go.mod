module gopeer

go 1.24

require github.com/greynewell/mist-go v0.1.0
