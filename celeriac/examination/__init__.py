"""What `celeriac doctor` looks at: this machine, the database, Redis, and the processes of the installation."""
