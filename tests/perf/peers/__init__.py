"""The student side by side with other SASRec implementations (`make peers`)."""
