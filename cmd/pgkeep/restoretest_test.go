package main

import "testing"

func TestARestoreTestIsAsThoroughAsAsked(t *testing.T) {
	for _, thorough := range []bool{false, true} {
		if q, err := (testOptions{Thorough: thorough}).request(); err != nil || q.Thorough != thorough {
			t.Errorf("asked for %v: %+v, %v", thorough, q, err)
		}
	}
}
