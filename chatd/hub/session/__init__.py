"""What one client asks for and gets, from its login on."""
