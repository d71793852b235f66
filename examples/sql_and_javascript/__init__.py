"""One base, two adapters: a company's SQL and JavaScript, trained, switched and mixed. See README.md."""
