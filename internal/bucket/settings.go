package bucket

// Deny is the policy of the bucket itself: what nobody may do, whatever else
// allows it. Without encryption on the way, with a key of the customer's that
// S3 forgets (which is how a ransom is taken), or by replacing what is there.
func (l Layout) Deny() Policy {
	everyone := &Principal{[]string{"*"}}
	all := l.key("*")
	deny := func(sid string, condition Condition, resources []string, actions ...string) Statement {
		return Statement{Sid: sid, Effect: "Deny", Principal: everyone, Action: actions, Resource: resources, Condition: condition}
	}
	statements := []Statement{
		deny("OnlyTLS", Condition{"Bool": {"aws:SecureTransport": {"false"}}}, []string{l.bucket(), all}, "s3:*"),
	}
	if !l.Basic {
		statements = append(statements,
			deny("NoCustomerKeys", Condition{"Null": {"s3:x-amz-server-side-encryption-customer-algorithm": {"false"}}}, []string{all}, "s3:PutObject"),
			deny("CreateOnly", Condition{"Null": {"s3:if-none-match": {"true"}}, "Bool": {"s3:ObjectCreationOperation": {"true"}}},
				[]string{l.key("PGKEEP"), l.key("keys/*"), l.key("names/*"), l.key("clusters/*/backups/*"), l.key("clusters/*/packs/*"), l.key("clusters/*/wal/*")},
				"s3:PutObject"))
	}
	return policy(statements...)
}

// Versioning keeps what was deleted or replaced as an older version.
type Versioning struct{ Status string }

// A Lifecycle is what the service does by itself, as PutBucketLifecycleConfiguration
// takes it.
type Lifecycle struct{ Rules []LifecycleRule }

// A LifecycleRule of the kind that a repository bears: it never ends an object,
// only what was deleted. A rule with Expiration of Days would eat backups.
type LifecycleRule struct {
	ID                             string
	Status                         string
	Filter                         Filter
	NoncurrentVersionExpiration    Noncurrent
	Expiration                     Markers
	AbortIncompleteMultipartUpload Uploads
}

// Filter says which objects a rule is for.
type Filter struct{ Prefix string }

// Noncurrent is for how many days after its deletion an object stays.
type Noncurrent struct{ NoncurrentDays int }

// Markers removes the mark of a deletion when nothing else is left of it.
type Markers struct{ ExpiredObjectDeleteMarker bool }

// Uploads ends those that nobody completed.
type Uploads struct{ DaysAfterInitiation int }

// Lock is the default of Object Lock, as PutObjectLockConfiguration takes it. It
// can be had for a bucket with versioning.
type Lock struct {
	ObjectLockEnabled string
	Rule              LockRule
}

// LockRule is what holds for every new object.
type LockRule struct{ DefaultRetention Retention }

// Retention is for how long nobody destroys a version: in mode COMPLIANCE really
// nobody, in GOVERNANCE whoever may bypass it.
type Retention struct {
	Mode string
	Days int
}

// Settings are those of the bucket that go with the roles.
type Settings struct {
	Versioning Versioning `json:"versioning"`
	Lifecycle  Lifecycle  `json:"lifecycle"`
	Lock       Lock       `json:"object_lock"`
	Policy     Policy     `json:"bucket_policy"`
}

// Settings keep what was deleted for that many days, and let nobody destroy what
// is younger.
func (l Layout) Settings(days int) Settings {
	prefix := l.Prefix
	if prefix != "" {
		prefix += "/"
	}
	mode := "COMPLIANCE"
	if l.Governance {
		mode = "GOVERNANCE"
	}
	return Settings{
		Versioning: Versioning{"Enabled"},
		Lifecycle: Lifecycle{[]LifecycleRule{{
			ID: "pgkeep", Status: "Enabled", Filter: Filter{prefix}, NoncurrentVersionExpiration: Noncurrent{days},
			Expiration: Markers{true}, AbortIncompleteMultipartUpload: Uploads{7},
		}}},
		Lock:   Lock{"Enabled", LockRule{Retention{mode, days}}},
		Policy: l.Deny(),
	}
}
