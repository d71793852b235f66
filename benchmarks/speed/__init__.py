"""What adapters cost in time, beside the frozen floor, full fine-tuning and other libraries."""
