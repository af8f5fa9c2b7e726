"""Row and column fine-tuning, and the tasks and models it runs on."""
