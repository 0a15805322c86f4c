"""Commands that analyse finished networks. Their code is in kd/tools/inspection."""
